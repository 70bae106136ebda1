"""The papers' tables and figures as studies: trials over factors and seeds, their statistics and reports."""
