"""Speech in and speech out for LFM2-Audio: holds the place, nothing is registered yet."""
