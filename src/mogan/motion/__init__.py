"""What motion is seen through: optical flow, the observation a discriminator is shown, pixel flux."""
