package announce

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// Options of an announcement. The zero value means the defaults.
type Options struct {
	// Repeats are the times after the first round at which the announcement is
	// sent again, ascending. nil means 50, 150, 300 and 500 ms; empty, never.
	Repeats []time.Duration
}

func (o Options) repeats() []time.Duration {
	if o.Repeats != nil {
		return o.Repeats
	}
	return []time.Duration{50 * time.Millisecond, 150 * time.Millisecond, 300 * time.Millisecond, 500 * time.Millisecond}
}

// Announce tells the network that the guest with these cards is on this host,
// first at once and then some times more over half a second, and returns when
// the last round is out or ctx is done. n is the number of addresses announced
// at least once. What is wrong with one card does not keep the others from
// being announced; the error joins all that was wrong.
func Announce(ctx context.Context, nics []NIC, opts Options) (n int, err error) {
	a, err := Begin(ctx, nics, opts)
	if a == nil {
		return 0, err
	}
	return a.Announced(), errors.Join(err, a.Repeat(ctx))
}

// Announcement is one under way: its first round is out.
type Announcement struct {
	out       *outlet
	cards     []card
	began     time.Time
	repeats   []time.Duration
	announced int
}

// card is what is sent for one NIC: frames by way, ready to go.
type card struct {
	nic       NIC
	frames    []framed
	addresses []netip.Addr // of those, and sent by the same frames
}

type framed struct {
	way way
	b   []byte
}

// Begin points the bridges at the guest's taps (see Redirect) and sends the
// first round of the announcement before it returns. An error may leave some
// cards announced: unless the Announcement is nil, which it is when nothing was
// sent at all for want of a socket or because ctx was done, the caller ends it
// with Repeat or Close.
func Begin(ctx context.Context, nics []NIC, opts Options) (*Announcement, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("announce: %w", err)
	}
	out, err := openOutlet(false)
	if err != nil {
		return nil, fmt.Errorf("announce: %w", err)
	}
	a := &Announcement{out: out, began: time.Now(), repeats: opts.repeats()}
	var errs []error
	for _, nic := range nics {
		c, err := prepare(nic)
		if err != nil {
			errs = append(errs, fmt.Errorf("announce: %s: %w", nic, err))
		}
		if c == nil {
			continue
		}
		a.cards = append(a.cards, *c)
		// Each card is on its way before the next one is looked at.
		if err := a.send(ctx, *c); err != nil {
			errs = append(errs, err)
			continue
		}
		a.announced += len(c.addresses)
	}
	return a, errors.Join(errs...)
}

// prepare redirects the bridge and builds the frames. A card with an error is
// announced as far as it goes; it is nil if nothing of it can be.
func prepare(nic NIC) (*card, error) {
	if err := nic.check(); err != nil {
		return nil, err
	}
	nic.MAC = slices.Clone(nic.MAC)
	var errs []error
	if err := redirect(nic); err != nil {
		errs = append(errs, err)
	}
	ways, err := waysOut(nic, false)
	if err != nil {
		return nil, errors.Join(append(errs, err)...)
	}
	c := &card{nic: nic}
	var frames []frame
	for _, addr := range nic.Addresses {
		fs, err := framesFor(nic, addr)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		frames = append(frames, fs...)
		c.addresses = append(c.addresses, addr)
	}
	if len(frames) == 0 {
		f, err := reverseRequest(nic)
		if err != nil {
			return nil, errors.Join(append(errs, err)...)
		}
		frames = append(frames, f)
	}
	for _, w := range ways {
		for _, f := range frames {
			b, err := f.bytes(w.vlan)
			if err != nil {
				return nil, errors.Join(append(errs, fmt.Errorf("build frame: %w", err))...)
			}
			c.frames = append(c.frames, framed{way: w, b: b})
		}
	}
	return c, errors.Join(errs...)
}

// send puts out one round of one card, on every port that takes it.
func (a *Announcement) send(ctx context.Context, c card) error {
	failed := make(map[int]bool) // ports; one error says enough
	var errs []error
	for _, f := range c.frames {
		if failed[f.way.index] {
			continue
		}
		if err := a.out.send(ctx, f.way.index, f.b); err != nil {
			failed[f.way.index] = true
			errs = append(errs, fmt.Errorf("announce: %s: send on port %d of %s: %w", c.nic, f.way.index, c.nic.Bridge, err))
		}
	}
	return errors.Join(errs...)
}

// Announced is the number of addresses that the first round announced, on
// every forwarding port of their bridge. An address on a bridge without another
// port counts: there is nobody there to tell.
func (a *Announcement) Announced() int { return a.announced }

// Repeat sends the remaining rounds at their times, and closes the
// announcement. It returns early when ctx is done.
func (a *Announcement) Repeat(ctx context.Context) error {
	var errs []error
	for _, at := range a.repeats {
		if err := wait(ctx, time.Until(a.began.Add(at))); err != nil {
			errs = append(errs, fmt.Errorf("announce: repeat: %w", err))
			break
		}
		for _, c := range a.cards {
			if err := a.send(ctx, c); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(append(errs, a.Close())...)
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return ctx.Err()
	}
}

// Close ends an announcement whose Repeat was not called. After Repeat it does
// nothing.
func (a *Announcement) Close() error {
	if a.out == nil {
		return nil
	}
	err := a.out.close()
	a.out = nil
	if err != nil {
		return fmt.Errorf("announce: close: %w", err)
	}
	return nil
}
