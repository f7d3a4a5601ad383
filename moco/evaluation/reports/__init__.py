"""What an evaluation draws: arrays and images in, matplotlib figures out.

Others take `drawing` (the plots), `embedded` (features with their images), `projections` (features
in fewer dimensions) and `knn_plots` (the plots of a kNN measurement).
"""
