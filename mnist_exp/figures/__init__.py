"""Numbers and images, as figures. The only folder that imports matplotlib."""
