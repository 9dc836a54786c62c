// Tables are sorted by a click on a column's name, films stopped at a step; without this script the page is as complete.
for (const head of document.querySelectorAll("thead th")) {
  const sort = () => {
    const body = head.closest("table").tBodies[0], down = head.ariaSort === "ascending" ? -1 : 1;
    for (const other of head.parentNode.children) other.ariaSort = null;
    head.ariaSort = down < 0 ? "descending" : "ascending";
    const text = (row) => row.cells[head.cellIndex].textContent, number = (row) => parseFloat(text(row));
    const compare = (a, b) => (number(a) - number(b)) * down || isNaN(number(a)) - isNaN(number(b)) || text(a).localeCompare(text(b)) * down;
    body.append(...[...body.rows].sort(compare));
  };
  head.tabIndex = 0;
  head.onclick = sort;
  head.onkeydown = (event) => event.key === "Enter" && sort();
}
for (const film of document.querySelectorAll(".film")) {
  const slider = film.querySelector("input[type=range]");
  slider.hidden = false;
  slider.oninput = () => {
    film.querySelector("input[type=checkbox]").checked = true;
    for (const moving of film.getAnimations({subtree: true})) moving.currentTime = 900 * (+slider.value + 0.5);
  };
}
