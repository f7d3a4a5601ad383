"""Several processes that train together: what they exchange, who starts and watches them."""
