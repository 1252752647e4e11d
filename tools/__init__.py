"""What developers run: it is part of neither the server nor the wheel."""
