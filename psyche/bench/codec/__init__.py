"""Speed and error of psyche's codecs and outer step, beside other people's in the same run."""
