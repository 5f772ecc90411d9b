"""The mark of work that is in no trace that is kept, which services set and the client library heeds."""

# A key of OpenTelemetry's context. Calls of such work are not traced either: each would be drawn anew, as the beginning
# of a trace of its own.
UNTRACED = "cognateforge.untraced"
