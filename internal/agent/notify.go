package agent

import (
	"io"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// notify tells systemd something, if it asked.
func (a *Agent) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		a.log.Warn("notify systemd", "state", state, "error", err)
	}
}

func (a *Agent) notifyStopping() { a.notify(daemon.SdNotifyStopping) }

// notifyReady tells systemd that the agent is ready and keeps its watchdog
// content until the result is closed. The ledger must answer for that: an agent
// that hangs there is of no use.
func (a *Agent) notifyReady() io.Closer {
	a.notify(daemon.SdNotifyReady)
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		a.log.Warn("systemd's watchdog", "error", err)
	}
	w := &watchdog{done: make(chan struct{})}
	if interval > 0 {
		w.wg.Go(func() { w.run(a, interval/2) })
	}
	return w
}

// watchdog feeds systemd's.
type watchdog struct {
	done chan struct{}
	once sync.Once
	wg   sync.WaitGroup
}

func (w *watchdog) run(a *Agent, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			a.ledger.List()
			a.notify(daemon.SdNotifyWatchdog)
		case <-w.done:
			return
		}
	}
}

// Close ends the feeding.
func (w *watchdog) Close() error {
	w.once.Do(func() { close(w.done) })
	w.wg.Wait()
	return nil
}
