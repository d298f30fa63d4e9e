// Package lease says which hosts of a shared device are alive, lets a host write
// only while it is one of them, and cuts off those that are not.
//
// An Area of a device holds one register and one heartbeat per slot. A host
// claims a slot with Claim and does all its I/O through the Session's Device,
// the gate. What else is on the device is the caller's affair.
//
// Invariants:
//
//   - A register changes only by compare-and-write, a heartbeat only by plain
//     write and only by the slot's owner. A heartbeat counts only if its
//     generation is the register's.
//   - A generation of a slot is claimed once, by the change of the register from
//     FREE or DONE to LIVE; it never returns.
//   - The lease extends only when the register, read after the heartbeat
//     completed, is clean, and counts from before the heartbeat was issued.
//   - A generation is dead once its register is DONE, FREE or newer. DONE follows
//     a fence (or a person's word and a drain wait), never the clock alone.
//   - Once a holder has read KILL, or anything but its own LIVE generation, it
//     submits nothing more, even if KILL is withdrawn.
//
// Non-goals: it does not choose who owns anything, does not replay anything, and
// does not make a lease alone safe: a write that passed the gate may land after
// the lease has ended, and only a block.Fencer can exclude that.
//
// The decisions are in two machines without I/O, Holder and Breaker; Session
// drives them. Lock order: Session.mu > gate.mu. No lock is held across I/O.
package lease
