"""Small models whose mechanisms are known, to score decompositions against."""
