"""The only room that knows Ray: sessions, parallel passes, streams, workers."""
