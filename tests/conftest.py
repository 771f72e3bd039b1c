"""Lets every test import `tiny`, which lies beside this file."""
