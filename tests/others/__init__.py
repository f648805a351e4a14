"""Libraries around Keras, each once; a test is skipped where its library is missing."""
