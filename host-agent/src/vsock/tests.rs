//! The device against a driver played by the test: rings in memory the test shares with it.

mod driver;
mod front_end;
mod hostile;
