"""The pages in the browser. They see runs through their folders and start commands; no model is ever loaded in this process."""
