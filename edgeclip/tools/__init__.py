"""Tools that check, measure and prepare an installation: bench, doctor, engine builds."""
