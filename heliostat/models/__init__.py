"""The resources and requests of the API, one file per noun. Client and server share them."""
