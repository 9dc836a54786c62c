"""The feature cache on disk: recipes, content-addressed Zarr stores, manifests. The only thing both stages share."""
