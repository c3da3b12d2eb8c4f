"""To and from other libraries; each is imported only when it is used."""
