"""Jobs: what the main job is made of, whatever the method: recipes, plans, the engine, solves, trials, resuming."""

from eckart.jobs.method import Job, Method
from eckart.jobs.plan import Layer, Plan
from eckart.jobs.recipe import Recipe
from eckart.jobs.result import Result

__all__ = ["Job", "Layer", "Method", "Plan", "Recipe", "Result"]
