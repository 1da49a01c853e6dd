"""What happens at boundaries: saving, publishing, resuming. Import classes from their own files."""

__all__: list[str] = []
