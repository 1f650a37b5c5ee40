package announce

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Bounds of what one Stranded keeps, far above what comes for a guest during a
// pause and some tens of milliseconds of a client's patience.
const (
	maxForwarded = 4096
	maxHeld      = 16 << 20 // bytes
)

// ErrTooMany says that frames were lost because more came than Stranded keeps.
var ErrTooMany = errors.New("more frames than are kept for a guest")

// Stranded sends on the frames that arrived at the source for a guest that had
// been stopped there and now runs at the destination. They went into the
// source's tap, which nobody reads any more, and would be lost with it: a
// client would have to time out and send again, 200 ms and more after a pause
// of a few.
//
// It keeps a copy of each frame that the tap is given for the guest, with the
// time at which the kernel gave it. Reading the tap instead would not do: a
// stopped QEMU still takes one frame out of it, and loses that. One frame may be
// lost all the same, if QEMU takes it so in the moment before it says that the
// guest is stopped.
//
// The order at the source:
//
//  1. OpenStranded, while the guest runs and the tap is a port of the bridge.
//     The tap stays there: frames that still come for the guest are then caught
//     too, until its announcement reaches this host's bridge, which from then
//     on does not send them to the tap.
//  2. The guest is stopped; Stopped says when. What came from then on it cannot
//     have received.
//  3. The guest has been committed to the destination, runs there, and the
//     first round of its announcement (Begin) is out.
//  4. Unread, and Forward for some tens of milliseconds.
//  5. Close, and only then the end of the hypervisor's process and the tap.
//
// Forward before step 3 would send frames to a switch that returns them to
// nobody. For a guest that resumes at the source there is only Close: its
// frames are in its tap.
//
// The frames go straight out of the bridge's uplinks, not through the bridge,
// so that none can come back to the tap. Their Ethernet source becomes the
// bridge's MAC: with the original one, the switches would take this host for
// the place where the client is, and the guest's answer would come here and be
// lost. Nothing that the guest does depends on the Ethernet source of a unicast
// packet; it sends to the MAC that ARP or neighbour discovery gave it.
type Stranded struct {
	nic  NIC
	from net.HardwareAddr // the bridge's
	ways []way
	out  *outlet
	in   *tapSocket
	done chan struct{} // closed when the reader has ended
	more chan struct{} // has an element when there may be frames for Forward

	mu        sync.Mutex
	stopped   time.Time // zero until it is known
	held      []heldFrame
	bytes     int // in held
	limit     int // frames to hold, and to keep from the stop on
	kept      int // frames from the stop on
	forwarded int
	dropped   int
	err       error // why the reader ended by itself
}

// heldFrame is one that a packet socket with PACKET_VNET_HDR can send.
type heldFrame struct {
	at time.Time
	b  []byte
}

// OpenStranded begins to keep the frames for the guest, which still runs.
func OpenStranded(nic NIC) (*Stranded, error) {
	s := &Stranded{nic: nic, limit: maxForwarded, done: make(chan struct{}), more: make(chan struct{}, 1)}
	s.nic.MAC = slices.Clone(nic.MAC)
	if err := s.open(); err != nil {
		return nil, fmt.Errorf("announce: stranded frames of %s: %w", nic, err)
	}
	go s.run()
	return s, nil
}

func (s *Stranded) open() error {
	if err := s.nic.check(); err != nil {
		return err
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
	tap, err := netlink.LinkByName(s.nic.Tap)
	if err != nil {
		return fmt.Errorf("find %s: %w", s.nic.Tap, err)
	}
	if s.out, err = openOutlet(true); err != nil {
		return err
	}
	if s.in, err = openTapSocket(tap.Attrs().Index, s.nic.MAC); err != nil {
		return errors.Join(err, s.out.close())
	}
	return nil
}

// run reads all the time, also before the stop: a busy guest's frames would
// else fill the socket's buffer just when those that count arrive.
func (s *Stranded) run() {
	defer close(s.done)
	for {
		b, at, err := s.in.next()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return
		case errors.Is(err, unix.ENETDOWN):
			continue // told once when the tap goes down or away
		case errors.Is(err, errUnreadable):
			s.drop()
			continue
		case err != nil:
			s.mu.Lock()
			s.err = err
			s.mu.Unlock()
			return
		}
		p, err := repack(b, s.nic.MAC, s.from)
		switch {
		case err == nil:
			s.hold(heldFrame{at: at, b: bytes.Clone(p)})
		case !errors.Is(err, errNotForIt):
			s.drop()
		}
	}
}

// drop counts a frame that cannot be sent on, if it is not known to be one from
// before the stop.
func (s *Stranded) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.stopped.IsZero() {
		s.dropped++
	}
}

// hold keeps a frame. Until the stop is known, the newest are kept, and from
// then on the oldest of those that came after it.
func (s *Stranded) hold(f heldFrame) {
	s.mu.Lock()
	defer s.mu.Unlock()
	known := !s.stopped.IsZero()
	if known && f.at.Before(s.stopped) {
		if s.kept > 0 {
			return // without a time
		}
		known = false
	}
	if known && s.kept >= s.limit {
		s.dropped++
		return
	}
	for s.early() > 0 && (s.bytes+len(f.b) > maxHeld || !known && s.early() >= s.limit) {
		s.bytes -= len(s.held[0].b)
		s.held[0].b = nil
		s.held = s.held[1:]
	}
	if s.bytes+len(f.b) > maxHeld {
		s.dropped++
		return
	}
	s.held = append(s.held, f)
	s.bytes += len(f.b)
	if known {
		s.kept++
		s.wake()
	}
}

// early is how many of the held frames are not known to be from after the stop.
func (s *Stranded) early() int {
	if s.stopped.IsZero() {
		return len(s.held)
	}
	if i := slices.IndexFunc(s.held, func(f heldFrame) bool { return !f.at.Before(s.stopped) }); i >= 0 {
		return i
	}
	return len(s.held)
}

func (s *Stranded) wake() {
	select {
	case s.more <- struct{}{}:
	default:
	}
}

// Stopped says when the guest was stopped, by the clock that both the kernel
// and the hypervisor read (CLOCK_REALTIME): from then on it has received
// nothing. A frame of before may have been received, or lie in the memory that
// goes to the destination; it is sent on only if Unread finds that it has not.
// Stopped is called once.
func (s *Stranded) Stopped(at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopped = at
	s.kept = len(s.held) - s.early()
	s.wake()
}

// Unread finds the frames from before the stop that the hypervisor has not
// even read: a QEMU that is about to stop its guest may leave its tap alone for
// some milliseconds. fds are the tap's queues, duplicates of the hypervisor's
// descriptors (TapFDs, pidfd_getfd); they stay the caller's, and what is in
// them is taken out, so that the guest must have been committed elsewhere. It
// comes after Stopped and before Forward.
func (s *Stranded) Unread(fds ...int) error {
	for _, fd := range fds {
		unread, err := readQueue(fd, s.nic, 2*s.limit)
		if err != nil {
			return fmt.Errorf("announce: stranded frames of %s: %w", s.nic, err)
		}
		s.keepUnread(unread)
	}
	return nil
}

// keepUnread has Forward begin with what the tap's queue began with. Where that
// may be in several places it is the last: no frame is to arrive twice.
func (s *Stranded) keepUnread(unread [][]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(unread) == 0 {
		return
	}
	for i := s.early() - 1; i >= 0; i-- {
		n := min(len(unread), len(s.held)-i)
		same := func(f heldFrame, b []byte) bool { return bytes.Equal(f.b[offloadHeader+offType:], b) }
		if slices.EqualFunc(s.held[i:i+n], unread[:n], same) {
			s.discard(i)
			early := s.early()
			for j := range early {
				s.held[j].at = s.stopped // as good as
			}
			s.kept += early
			s.wake()
			return
		}
	}
}

// discard forgets the first n of the held frames.
func (s *Stranded) discard(n int) {
	for _, f := range s.held[:n] {
		s.bytes -= len(f.b)
	}
	s.held = slices.Delete(s.held, 0, n)
}

// Forward sends on what came from the stop on, and what still comes until ctx
// is done, which is no error; with a ctx that is done already it sends on only
// what is there. Each frame is sent on once, in the order in which they came.
// frames is how many went out so far, in all calls. A frame that cannot be sent
// is dropped and counted (Dropped). It needs Stopped.
func (s *Stranded) Forward(ctx context.Context) (frames int, err error) {
	for {
		s.sendHeld()
		select {
		case <-s.more:
			continue
		case <-s.done:
		case <-ctx.Done():
		}
		break
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.stopped.IsZero():
		err = errors.New("it is not known when the guest was stopped")
	case s.err != nil:
		err = s.err
	case s.kept >= s.limit && s.dropped > 0:
		err = ErrTooMany
	}
	if err != nil {
		err = fmt.Errorf("announce: stranded frames of %s: %w", s.nic, err)
	}
	return s.forwarded, err
}

// sendHeld sends on the frames that are held.
func (s *Stranded) sendHeld() {
	s.mu.Lock()
	if s.stopped.IsZero() {
		s.mu.Unlock()
		return
	}
	s.discard(s.early())
	frames := s.held
	s.held, s.bytes = nil, 0
	s.mu.Unlock()
	forwarded, dropped := 0, 0
	for _, f := range frames {
		if s.send(f.b) {
			forwarded++
		} else {
			dropped++
		}
	}
	s.mu.Lock()
	s.forwarded += forwarded
	s.dropped += dropped
	s.mu.Unlock()
}

// send puts a frame onto the uplinks and says whether any took it.
func (s *Stranded) send(p []byte) bool {
	sent := false
	for _, w := range s.ways {
		// No context: a packet socket that cannot send at once (ENOBUFS, an
		// uplink that is down, a frame above its MTU) says so.
		if err := s.out.send(context.Background(), w.index, tag(p, w.vlan)); err == nil {
			sent = true
		}
	}
	return sent
}

// Tap is the tap whose frames are kept.
func (s *Stranded) Tap() string { return s.nic.Tap }

// Dropped is how many frames for the guest could not be sent on.
func (s *Stranded) Dropped() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dropped
}

// Close ends the keeping, and forgets what has not been sent on. It is not
// called during Forward.
func (s *Stranded) Close() error {
	err := s.in.interrupt()
	if err == nil { // else the reader would not end
		<-s.done
	}
	if err := errors.Join(err, s.in.close(), s.out.close()); err != nil {
		return fmt.Errorf("announce: stranded frames of %s: close: %w", s.nic, err)
	}
	return nil
}
