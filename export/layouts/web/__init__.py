"""Layout of a static web page that searches a gallery in the browser, without a server."""
