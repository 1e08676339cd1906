"""Labels of channels: what meets, which labels are one channel, and how they make up channel spaces."""
