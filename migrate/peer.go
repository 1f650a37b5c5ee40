package migrate

import (
	"context"
	"fmt"
	"net"
	"sync"
)

// peer is the destination as the source sees it: the control connection and
// what has come from it.
type peer struct {
	ctl   *control
	inbox chan message
	// answers are what the destination's hypervisor says to ours, in relay mode.
	answers *answers
	done    sync.WaitGroup
}

type message struct {
	typ  controlType
	body []byte
}

// withdrawnError says that the destination, durably, never ran the guest.
type withdrawnError struct{ reason string }

func (e *withdrawnError) Error() string { return "the destination withdrew: " + e.reason }

// connect opens the control connection. lost is called, once, when the
// destination fails or cannot be reached any more.
func (s *Sender) connect(ctx context.Context, dial func(context.Context) (net.Conn, error), p preamble, lost func(error)) (*peer, error) {
	conn, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write(p.append(nil)); err != nil {
		conn.Close()
		return nil, err
	}
	timeout := s.PeerTimeout
	if timeout <= 0 {
		timeout = DefaultPeerTimeout
	}
	// The destination sends at most a message a pass and a handful besides;
	// one that sends more than fit here is cut off.
	pr := &peer{ctl: newControl(conn, timeout), inbox: make(chan message, 64), answers: newAnswers()}
	pr.done.Add(1)
	go func() {
		defer pr.done.Done()
		defer pr.answers.close()
		lost(pr.listen())
	}()
	return pr, nil
}

// close ends the connection and waits for the listener.
func (p *peer) close() {
	p.ctl.close()
	p.done.Wait()
}

// listen passes messages on until one of them, or the connection, is the end.
func (p *peer) listen() error {
	for {
		t, body, err := p.ctl.recv()
		if err != nil {
			return err
		}
		switch t {
		case ctlRefused:
			var m refusedMsg
			if err := decodeBody(t, body, &m); err != nil {
				return err
			}
			return &Refusal{Reasons: m.Reasons}
		case ctlFailed:
			var m reasonMsg
			if err := decodeBody(t, body, &m); err != nil {
				return err
			}
			return fmt.Errorf("the destination failed: %s", m.Reason)
		case ctlWithdrawn:
			var m reasonMsg
			if err := decodeBody(t, body, &m); err != nil {
				return err
			}
			return &withdrawnError{reason: m.Reason}
		case ctlAnswer:
			if err := p.answers.write(body); err != nil {
				return err
			}
			continue
		}
		select {
		case p.inbox <- message{t, append([]byte(nil), body...)}:
		default:
			return violation("too many messages from the destination")
		}
	}
}

// await returns when the next message is of the wanted type, decoded into m.
func (p *peer) await(ctx context.Context, want controlType, m any) error {
	var got message
	select {
	case got = <-p.inbox:
	default:
		select {
		case got = <-p.inbox:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if got.typ != want {
		return violation("%v where %v was due", got.typ, want)
	}
	if m == nil {
		if len(got.body) != 0 {
			return violation("%v with a body", got.typ)
		}
		return nil
	}
	return decodeBody(got.typ, got.body, m)
}
