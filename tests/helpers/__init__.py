"""What tests share: tiny models, oracles, published sizes."""
