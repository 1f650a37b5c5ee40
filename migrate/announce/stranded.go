package announce

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Bounds of one Forward, far above what a tap's queue (1000 frames by default)
// and some tens of milliseconds of a client's patience hold.
const (
	maxForwarded = 4096
	maxRead      = 4 * maxForwarded
)

// ErrTooMany says that Forward gave up because more frames came than can have
// been stranded.
var ErrTooMany = errors.New("more frames than can have been stranded")

// Stranded sends on the frames that arrived at the source for a guest that had
// been stopped there and now runs at the destination. They wait in the queue of
// the source's tap, which nobody reads any more, and would be lost with it: a
// client would have to time out and send again, 200 ms and more after a pause
// of a few.
//
// The order at the source:
//
//  1. The guest is stopped.
//  2. OpenStranded, while the tap is a port of the bridge. The tap may stay
//     there: frames that still come for the guest are then caught and sent on
//     too, until its announcement reaches this host's bridge, which from then
//     on does not send them to the tap.
//  3. The guest has been committed to the destination, runs there, and the
//     first round of its announcement (Begin) is out.
//  4. Forward, for some tens of milliseconds.
//  5. Close, and only then the end of the hypervisor's process and the tap.
//
// Forward before step 3 would send frames to a switch that returns them to
// nobody; on a guest that resumes at the source it would steal its frames.
//
// One frame may be lost all the same: a stopped QEMU (seen with 7.2) still takes
// the first one out of its tap and then reads no more.
//
// The frames go straight out of the bridge's uplinks, not through the bridge,
// so that none can come back to the tap. Their Ethernet source becomes the
// bridge's MAC: with the original one, the switches would take this host for
// the place where the client is, and the guest's answer would come here and be
// lost. Nothing that the guest does depends on the Ethernet source of a unicast
// packet; it sends to the MAC that ARP or neighbour discovery gave it.
type Stranded struct {
	nic    NIC
	from   net.HardwareAddr // the bridge's
	ways   []way
	out    *outlet
	queues []queue
	stats  stats
	limit  int64 // frames to send on
}

type queue struct {
	file   *os.File
	format tapFormat
}

type stats struct{ read, forwarded, dropped atomic.Int64 }

// OpenStranded takes over the descriptors of the tap's queues, duplicates of
// the hypervisor's (TapFDs, pidfd_getfd), and closes them also if it fails. The
// tap is a port of the bridge and the guest is stopped.
func OpenStranded(nic NIC, fds ...int) (*Stranded, error) {
	s := &Stranded{nic: nic, limit: maxForwarded}
	s.nic.MAC = slices.Clone(nic.MAC)
	files := make([]*os.File, 0, len(fds))
	for _, fd := range fds {
		// Before os.NewFile, which then lets reads wait with a deadline.
		// QEMU's own descriptors are non-blocking, and this flag is shared.
		err := unix.SetNonblock(fd, true)
		f := os.NewFile(uintptr(fd), nic.Tap)
		if f == nil {
			err = unix.EBADF
		} else {
			files = append(files, f)
		}
		if err != nil {
			return nil, s.refuse(files, fmt.Errorf("descriptor %d: %w", fd, err))
		}
	}
	if err := s.open(files); err != nil {
		return nil, s.refuse(files, err)
	}
	return s, nil
}

// refuse closes what a failed OpenStranded had taken over.
func (s *Stranded) refuse(files []*os.File, cause error) error {
	errs := []error{fmt.Errorf("announce: stranded frames of %s: %w", s.nic, cause)}
	for _, f := range files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

func (s *Stranded) open(files []*os.File) error {
	if err := s.nic.check(); err != nil {
		return err
	}
	if len(files) == 0 {
		return errors.New("no descriptor of the tap")
	}
	for _, f := range files {
		format, name, err := probeFile(f)
		if err != nil {
			return err
		}
		if name != s.nic.Tap {
			return fmt.Errorf("the descriptor is of %s", name)
		}
		s.queues = append(s.queues, queue{file: f, format: format})
	}
	bridge, err := bridgeLink(s.nic.Bridge)
	if err != nil {
		return err
	}
	s.from = slices.Clone(bridge.Attrs().HardwareAddr)
	if len(s.from) != 6 {
		return fmt.Errorf("%s has no MAC", s.nic.Bridge)
	}
	if s.ways, err = waysOut(s.nic, true); err != nil {
		return err
	}
	if len(s.ways) == 0 {
		return fmt.Errorf("%s has no uplink that forwards", s.nic.Bridge)
	}
	s.out, err = openOutlet(true)
	return err
}

func probeFile(f *os.File) (format tapFormat, name string, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return tapFormat{}, "", err
	}
	if e := raw.Control(func(fd uintptr) { format, name, err = probeTap(int(fd)) }); e != nil {
		return tapFormat{}, "", e
	}
	return format, name, err
}

// Forward sends on what the tap's queues hold, and what comes after, until ctx
// is done, which is no error; with a ctx that is done already it sends on only
// what is there. frames is how many went out so far, in all calls. A frame that
// cannot be sent is dropped and counted (Dropped).
func (s *Stranded) Forward(ctx context.Context) (frames int, err error) {
	group, ctx := errgroup.WithContext(ctx)
	for _, q := range s.queues {
		group.Go(func() error { return s.drain(ctx, q) })
	}
	err = group.Wait()
	if err != nil {
		err = fmt.Errorf("announce: stranded frames of %s: %w", s.nic, err)
	}
	return int(s.stats.forwarded.Load()), err
}

// Dropped is how many frames for the guest could not be sent on.
func (s *Stranded) Dropped() int { return int(s.stats.dropped.Load()) }

func (s *Stranded) drain(ctx context.Context, q queue) error {
	raw, err := q.file.SyscallConn()
	if err != nil {
		return err
	}
	// The largest frame of a tap, and a VLAN tag.
	b := make([]byte, q.format.info+q.format.header+64<<10+64)
	next := func(fd uintptr) error {
		n, err := unix.Read(int(fd), b)
		if err != nil {
			return err
		}
		return s.forward(q.format, b[:n])
	}
	// What is there already is sent on whatever has become of ctx.
	for err == nil || errors.Is(err, unix.EINTR) {
		if e := raw.Control(func(fd uintptr) { err = next(fd) }); e != nil {
			return e
		}
	}
	if !errors.Is(err, unix.EAGAIN) {
		return tapEnd(err)
	}
	if err := q.file.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() {
		// It can fail only on a closed file, which ends the read as well.
		_ = q.file.SetReadDeadline(time.Unix(1, 0))
	})
	defer stop()
	for ctx.Err() == nil {
		e := raw.Read(func(fd uintptr) bool {
			err = next(fd)
			return !errors.Is(err, unix.EAGAIN)
		})
		if errors.Is(e, os.ErrDeadlineExceeded) {
			return nil
		}
		if e != nil {
			return e
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return tapEnd(err)
		}
	}
	return nil
}

// tapEnd: a tap that has been removed has no more frames (the driver says
// EBADFD or EFAULT), which ends the reading as well as ctx does.
func tapEnd(err error) error {
	if errors.Is(err, unix.EBADFD) || errors.Is(err, unix.EFAULT) {
		return nil
	}
	return err
}

// forward sends one frame on. Only what must end the forwarding is an error.
func (s *Stranded) forward(format tapFormat, b []byte) error {
	if s.stats.read.Add(1) > maxRead || s.stats.forwarded.Load() >= s.limit {
		return ErrTooMany
	}
	p, err := format.repack(b, s.nic.MAC, s.from)
	switch {
	case errors.Is(err, errNotForIt):
		return nil
	case err != nil:
		s.stats.dropped.Add(1)
		return nil
	}
	sent := false
	for _, w := range s.ways {
		// No context: a packet socket that cannot send at once (ENOBUFS, an
		// uplink that is down, a frame above its MTU) says so.
		if err := s.out.send(context.Background(), w.index, tag(p, w.vlan)); err == nil {
			sent = true
		}
	}
	if sent {
		s.stats.forwarded.Add(1)
	} else {
		s.stats.dropped.Add(1)
	}
	return nil
}

// Close gives the descriptors back. It is not called during Forward.
func (s *Stranded) Close() error {
	errs := []error{s.out.close()}
	for _, q := range s.queues {
		errs = append(errs, q.file.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("announce: stranded frames of %s: close: %w", s.nic, err)
	}
	return nil
}
