"""What `ngrpo doctor` looks at: this machine and its packages, in checks that a broken environment cannot end."""
