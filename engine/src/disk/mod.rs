//! Implementations of the [`Host`](crate::host::Host) seam.

#[cfg(feature = "glommio")]
mod durable;
#[cfg(feature = "glommio")]
pub mod glommio;
pub mod sim;
