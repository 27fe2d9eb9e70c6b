"""What is read out of studies beside their claims: fronts, surfaces, scaling, the scoreboard."""
