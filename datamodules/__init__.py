"""Where samples come from: LightningDataModules over own files, published data sets and streams of both."""
