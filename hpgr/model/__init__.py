"""The mathematics: embeddings, SEM, PGSA, HSTU. No data reading, no Ray.

Legend of shapes in names: B rows, N padded history, M padded candidates, Q queries (history or candidates),
S sessions, K anchors, H heads, D width, E width of a head, V item table.
"""
