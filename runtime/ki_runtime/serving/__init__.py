"""`ki-serve`: a policy behind openpi's websocket protocol, for many robots at once. Imports: nothing."""
