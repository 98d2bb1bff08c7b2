//! Implementations of the [`Host`](crate::host::Host) seam.

#[cfg(feature = "glommio")]
pub mod glommio;
pub mod sim;
#[cfg(feature = "glommio")]
mod uring;
