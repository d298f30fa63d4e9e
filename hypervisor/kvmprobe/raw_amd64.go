package kvmprobe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// KVM's ioctls (linux/kvm.h).
const (
	kvmGetAPIVersion     = 0xae00
	kvmCreateVM          = 0xae01
	kvmGetVCPUMmapSize   = 0xae04
	kvmGetSupportedCPU   = 0xc008ae05
	kvmCreateVCPU        = 0xae41
	kvmSetMemoryRegion   = 0x4020ae46
	kvmSetTSSAddr        = 0xae47
	kvmSetIdentityMap    = 0x4008ae48
	kvmRun               = 0xae80
	kvmSetRegs           = 0x4090ae82
	kvmSetSregs          = 0x4138ae84
	kvmSetCPUID2         = 0x4008ae90
	kvmAPIVersion        = 12
	kvmExitIO            = 2
	tssAddress           = 0xfffbd000 // three pages that no guest of ours touches
	maxExits             = 64         // the payload makes nine
	maxCPUIDEntries      = 256
	portSay, portVerdict = 0xe9, 0xf4
)

// The child's memory: the guest's RAM, then what the ioctls read and write.
const (
	guestBytes  = 4 << 20
	loadAddress = 1 << 20
	entryOffset = 32       // of the payload: past its multiboot header
	offRun      = 4 << 20  // struct kvm_run, mapped here by the child
	runBytes    = 64 << 10 // room for it
	offCPUID    = offRun + runBytes
	offRegion   = offCPUID + 16<<10
	offIdentity = offRegion + 64
	offRegs     = offIdentity + 64
	offSregs    = offRegs + 256
	arenaBytes  = offSregs + 4096
)

// rawResult is on a page that parent and child share.
type rawResult struct {
	step    uint32 // index into rawSteps: the last thing tried
	errno   uint32 // of that thing
	value   uint32 // what it answered, when that was wrong
	exit    uint32 // KVM's last exit reason
	verdict uint32
	said    uint32 // length of words
	words   [16]byte
}

var rawSteps = [...]string{
	"start", "close inherited files", "API version", "create VM", "set TSS address", "set identity map",
	"add memory", "create vCPU", "read CPUID", "set CPUID", "size of the run area", "map the run area",
	"set segment registers", "set registers", "run",
}

// rawRun is everything the child needs, made before the fork: the child must not
// allocate, grow its stack or enter the Go scheduler.
type rawRun struct {
	kvm    uintptr
	arena  []byte
	result *rawResult
}

// rawStage runs the guest on a bare vCPU in a forked child, because a vCPU that
// hangs in the kernel takes its process with it.
func rawStage(kvm *os.File) error {
	arena, err := unix.Mmap(-1, 0, arenaBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	defer unix.Munmap(arena)
	shared, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANON)
	if err != nil {
		return err
	}
	defer unix.Munmap(shared)
	r := &rawRun{kvm: kvm.Fd(), arena: arena, result: (*rawResult)(unsafe.Pointer(&shared[0]))}
	r.prepare()
	// The child dies with the thread that forked it, so the thread must outlast it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	pid, pidfd, err := r.fork()
	if err != nil {
		return fmt.Errorf("fork: %w", err)
	}
	hung, err := reap(pid, pidfd, rawLimit)
	if err != nil {
		return err
	}
	return r.outcome(hung)
}

// prepare fills in what the ioctls read.
func (r *rawRun) prepare() {
	copy(r.arena[loadAddress:], payload)
	le := binary.LittleEndian
	// struct kvm_userspace_memory_region: slot, flags, guest address, size, address
	region := r.arena[offRegion:]
	le.PutUint64(region[16:], guestBytes)
	le.PutUint64(region[24:], uint64(r.addr(0)))
	le.PutUint64(r.arena[offIdentity:], tssAddress-4096)
	le.PutUint32(r.arena[offCPUID:], maxCPUIDEntries)
	// struct kvm_regs: rax first, rip and rflags last of 18
	regs := r.arena[offRegs:]
	le.PutUint64(regs[0:], 0x2badb002)
	le.PutUint64(regs[16*8:], loadAddress+entryOffset)
	le.PutUint64(regs[17*8:], 2)
	// struct kvm_sregs: cs ds es fs gs ss tr ldt, gdt, idt, cr0 cr2 cr3 cr4 cr8
	// efer apic_base, interrupts. Flat 32-bit protected mode, as multiboot enters.
	sregs := r.arena[offSregs:]
	for i := range 8 {
		seg := sregs[i*24:]
		le.PutUint32(seg[8:], 0xffffffff)
		le.PutUint16(seg[12:], 0x10)
		// type, present, dpl, db, s, l, g, avl, unusable
		copy(seg[14:], []byte{3, 1, 0, 1, 1, 0, 1, 0, 0})
	}
	le.PutUint16(sregs[12:], 0x08)
	sregs[14] = 11                                            // cs: code, read, accessed
	copy(sregs[6*24+14:], []byte{11, 1, 0, 0, 0, 0, 0, 0, 0}) // tr: busy 32-bit TSS
	le.PutUint32(sregs[6*24+8:], 0xffff)                      // its limit
	copy(sregs[7*24+14:], []byte{2, 0, 0, 0, 0, 0, 0, 0, 1})  // ldt: none
	const control = 8*24 + 2*16                               // offset of cr0
	le.PutUint64(sregs[control:], 0x11)                       // cr0: ET, PE
	le.PutUint64(sregs[control+6*8:], 0xfee00000|1<<11|1<<8)  // APIC on, boot processor
}

func (r *rawRun) addr(off int) uintptr { return uintptr(unsafe.Pointer(&r.arena[off])) }

// fork starts the child from a locked thread. Signals stay blocked in it, so no Go handler ever runs
// there; ForkLock keeps half-made descriptors of other goroutines out of it.
func (r *rawRun) fork() (pid, pidfd int, err error) {
	var all, old unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^uint64(0)
	}
	syscall.ForkLock.Lock()
	defer syscall.ForkLock.Unlock()
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &old); err != nil {
		return 0, 0, err
	}
	fd := int32(-1)
	id, errno := r.clone(&fd)
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil); err != nil {
		errno = err.(unix.Errno)
	}
	if errno != 0 {
		return 0, 0, errno
	}
	return int(id), int(fd), nil
}

// clone returns in the parent only.
//
//go:norace
//go:nosplit
//go:nocheckptr
func (r *rawRun) clone(pidfd *int32) (uintptr, syscall.Errno) {
	id, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD)|unix.CLONE_PIDFD, 0, uintptr(unsafe.Pointer(pidfd)), 0, 0, 0)
	if errno != 0 || id != 0 {
		return id, errno
	}
	r.child()
	for {
		_, _, _ = syscall.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}
}

// try does one system call as a step of the child and says whether it succeeded.
//
//go:norace
//go:nosplit
//go:nocheckptr
func (r *rawRun) try(step uint32, nr, a, b, c uintptr) (uintptr, bool) {
	r.result.step = step
	v, _, errno := syscall.RawSyscall(nr, a, b, c)
	r.result.errno = uint32(errno)
	return v, errno == 0
}

// child is all that the forked process does. It holds only copies of this
// process's memory, and lets go of its files first: a lock of the storage must
// not live on in a vCPU that hangs.
//
//go:norace
//go:nosplit
//go:nocheckptr
func (r *rawRun) child() {
	base := uintptr(unsafe.Pointer(&r.arena[0]))
	const kvm = 0
	if r.kvm != kvm {
		if _, ok := r.try(1, unix.SYS_DUP3, r.kvm, kvm, 0); !ok {
			return
		}
	}
	if _, ok := r.try(1, unix.SYS_CLOSE_RANGE, kvm+1, 1<<31, 0); !ok {
		return
	}
	// A parent that dies may not leave a hung vCPU behind.
	if _, ok := r.try(1, unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0); !ok {
		return
	}
	v, ok := r.try(2, unix.SYS_IOCTL, kvm, kvmGetAPIVersion, 0)
	if r.result.value = uint32(v); !ok || v != kvmAPIVersion {
		return
	}
	vm, ok := r.try(3, unix.SYS_IOCTL, kvm, kvmCreateVM, 0)
	if !ok {
		return
	}
	if _, ok := r.try(4, unix.SYS_IOCTL, vm, kvmSetTSSAddr, tssAddress); !ok {
		return
	}
	if _, ok := r.try(5, unix.SYS_IOCTL, vm, kvmSetIdentityMap, base+offIdentity); !ok {
		return
	}
	if _, ok := r.try(6, unix.SYS_IOCTL, vm, kvmSetMemoryRegion, base+offRegion); !ok {
		return
	}
	vcpu, ok := r.try(7, unix.SYS_IOCTL, vm, kvmCreateVCPU, 0)
	if !ok {
		return
	}
	if _, ok := r.try(8, unix.SYS_IOCTL, kvm, kvmGetSupportedCPU, base+offCPUID); !ok {
		return
	}
	if _, ok := r.try(9, unix.SYS_IOCTL, vcpu, kvmSetCPUID2, base+offCPUID); !ok {
		return
	}
	size, ok := r.try(10, unix.SYS_IOCTL, kvm, kvmGetVCPUMmapSize, 0)
	if r.result.value = uint32(size); !ok || size > runBytes {
		return
	}
	r.result.step = 11
	_, _, errno := syscall.RawSyscall6(unix.SYS_MMAP, base+offRun, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_FIXED, vcpu, 0)
	if r.result.errno = uint32(errno); errno != 0 {
		return
	}
	if _, ok := r.try(12, unix.SYS_IOCTL, vcpu, kvmSetSregs, base+offSregs); !ok {
		return
	}
	if _, ok := r.try(13, unix.SYS_IOCTL, vcpu, kvmSetRegs, base+offRegs); !ok {
		return
	}
	r.run(vcpu)
}

// run lets the guest run and notes what it says, until its verdict or another
// exit than port output.
//
//go:norace
//go:nosplit
//go:nocheckptr
func (r *rawRun) run(vcpu uintptr) {
	// struct kvm_run: exit_reason at 8; for port I/O from 32 on direction, size,
	// port (16 bits), count (32 bits), offset of the data (64 bits).
	area := unsafe.Pointer(&r.arena[offRun])
	res := r.result
	for range maxExits {
		if _, ok := r.try(14, unix.SYS_IOCTL, vcpu, kvmRun, 0); !ok {
			if res.errno == uint32(unix.EINTR) {
				continue
			}
			return
		}
		res.exit = *(*uint32)(unsafe.Add(area, 8))
		if res.exit != kvmExitIO {
			return
		}
		off := *(*uint64)(unsafe.Add(area, 40))
		if off >= runBytes {
			return
		}
		data := *(*byte)(unsafe.Add(area, off))
		switch *(*uint16)(unsafe.Add(area, 34)) {
		case portSay:
			if res.said < uint32(len(res.words)) {
				res.words[res.said] = data
				res.said++
			}
		case portVerdict:
			res.verdict = uint32(data)
			return
		default:
			return
		}
	}
}

// reap waits for the child, kills it at the limit and says whether it had to.
func reap(pid, pidfd int, limit time.Duration) (hung bool, err error) {
	defer unix.Close(pidfd)
	ended, err := pollEnd(pidfd, limit)
	if err == nil && !ended {
		hung = true
		if err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return hung, err
		}
		ended, err = pollEnd(pidfd, limit)
	}
	if err != nil {
		return hung, err
	}
	if !ended {
		return hung, fmt.Errorf("the vCPU hangs in the kernel and process %d cannot be killed", pid)
	}
	_, err = unix.Wait4(pid, nil, 0, nil)
	return hung, err
}

func pollEnd(pidfd int, limit time.Duration) (bool, error) {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	var n int
	var err error = unix.EINTR
	// A signal starts the wait anew, so their number is bounded.
	for try := 0; try < 50 && errors.Is(err, unix.EINTR); try++ {
		ts := unix.NsecToTimespec(int64(limit))
		n, err = unix.Ppoll(fds, &ts, nil)
	}
	return n > 0, err
}

// outcome turns the child's notes into a verdict.
func (r *rawRun) outcome(hung bool) error {
	res := *r.result
	said := string(res.words[:min(int(res.said), len(res.words))])
	step := rawSteps[min(int(res.step), len(rawSteps)-1)]
	switch {
	case hung:
		return fmt.Errorf("%s: no answer in %v; the guest said %q", step, rawLimit, said)
	case res.errno != 0:
		return fmt.Errorf("%s: %w; the guest said %q", step, syscall.Errno(res.errno), said)
	case int(res.step) < len(rawSteps)-1:
		return fmt.Errorf("%s: unexpected answer %d", step, res.value)
	case res.exit != kvmExitIO:
		return fmt.Errorf("%s: KVM exit %d; the guest said %q", step, res.exit, strings.ToValidUTF8(said, "?"))
	default:
		return judge(said, int(res.verdict))
	}
}
