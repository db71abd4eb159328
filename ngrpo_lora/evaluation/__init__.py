"""Whether one model or picture is better than another, with intervals: by rewards, and by people's votes."""
