"""A file for each page: TITLE, PATH and `build(place)`, called where its components shall stand."""
