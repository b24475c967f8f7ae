"""Search by text: galleries of images, answers, and an HTML page of results."""
