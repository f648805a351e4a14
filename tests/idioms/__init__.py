"""Small programs in the idioms of the field, run on `keras.Model` and on `TapeModel`."""
