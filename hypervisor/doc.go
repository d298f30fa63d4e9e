// Package hypervisor runs virtual machines as QEMU processes: it checks a Spec,
// chooses the accelerator, starts a confined QEMU, steers it by QMP and finds it
// again after its starter's restart. It opens no disks (a disk is an NBD export
// on a unix socket) and decides nothing about where or whether a VM may run; the
// caller holds the locks of the disks.
//
// A QEMU is nobody's child in spirit: own session, no death signal, its output in
// files. It outlives its starter, which finds it again with Attach. (Under
// systemd the starter's unit needs KillMode=process.)
//
// Confinement, when the starter is root: the VM's own uid and gid, no
// supplementary groups, no capabilities and an empty bounding set,
// no_new_privs, own network (empty), mount, IPC and UTS namespaces, a root
// folder that holds only /usr (read-only), a few device nodes, the boot files and
// the folders of the disks' sockets, and QEMU's full seccomp sandbox. The QMP and
// console sockets are opened by the starter and inherited, so QEMU can write to
// no folder, and the run folder belongs to the starter: what a captured QEMU
// could forge, the starter never trusts. A starter that is not root runs QEMU as
// itself with no_new_privs and seccomp only; VM.Confined tells.
//
// Invariants: at most one QEMU per run folder lives, whoever starts it (a lock on
// an inherited descriptor, released by the kernel when QEMU is gone); the guest
// runs its first instruction only after the VM's record is in the run folder; a
// QEMU whose start failed is dead when Start returns.
//
// Start throws away an operating system thread, so a process that calls it may not
// use SysProcAttr.Pdeathsig elsewhere, which follows the thread.
//
// Lock order: none; VM has no lock of its own.
package hypervisor
