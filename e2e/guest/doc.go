// Package guest is the proof a test guest leaves on its disk: a ring of
// checksummed 4 KiB records whose content any reader can judge, and the lines
// the guest prints about them. The guest's /init (guestinit) writes the ring,
// tests on the host read it back from snapshots, clones and exports.
//
// It does not start guests; package hypervisor does.
//
// Invariants of a ring: at most one record is in flight; record n+1 is written
// only after record n and an fdatasync were acknowledged. So on a disk that
// loses nothing acknowledged, every record up to the newest one present is
// readable, and only the block of the record after it may be torn.
package guest
