"""Whether a model or picture is better than another, with intervals: by rewards, and by people's eyes."""
