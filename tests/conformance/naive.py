"""What anyone would write first.

Hundreds of Keras's tests fail on these two, which shows that the tests can fail.
"""

import keras


class NaiveModel(keras.Model):
    pass


class NaiveSequential(keras.Sequential):
    pass
