"""What goes with weights that are shared: the card, the licence, and code for those who have no bitdance_scale."""
