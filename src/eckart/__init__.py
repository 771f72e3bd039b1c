"""eckart"""
