from hypothesis import settings

settings.register_profile("wrapq", deadline=None, max_examples=30)
settings.load_profile("wrapq")
