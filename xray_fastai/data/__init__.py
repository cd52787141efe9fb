"""Files become images, and images become a table with labels, patients and splits."""
