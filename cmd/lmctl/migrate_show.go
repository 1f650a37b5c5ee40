package main

import (
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/migrate"
)

// progress shows a migration under way: a line for each finished pass and, on a
// terminal, a bar for the one that is not. With --json it is silent.
type progress struct {
	o      *options
	bars   *mpb.Progress // nil where there is no terminal
	bar    *mpb.Bar
	pass   int32 // the bar's
	done   int   // finished passes shown
	state  string
	latest atomic.Pointer[lmctlv1.Progress]
}

func newProgress(o *options) *progress {
	p := &progress{o: o}
	if f, ok := o.out.(*os.File); ok && !o.json && term.IsTerminal(int(f.Fd())) {
		p.bars = mpb.New(mpb.WithOutput(f), mpb.WithWidth(48), mpb.WithRefreshRate(100*time.Millisecond))
	}
	return p
}

// update shows what has become of the migration. Progress comes in order, so
// that nothing shown is ever taken back.
func (p *progress) update(m *lmctlv1.Migration) {
	if p.o.json {
		return
	}
	if pr := m.Progress; pr != nil {
		p.latest.Store(pr)
		for _, pass := range pr.Passes[min(p.done, len(pr.Passes)):] {
			p.endBar()
			p.line("%s", passLine(pass))
			p.done++
		}
		p.draw(pr)
	}
	if m.State != p.state && m.State == string(migrate.SourceSuspending) {
		p.endBar()
	}
	p.state = m.State
}

// draw moves the bar of the pass under way.
func (p *progress) draw(pr *lmctlv1.Progress) {
	if p.bars == nil || int(pr.Pass) <= p.done || pr.PassPages == 0 {
		return
	}
	if p.bar == nil || p.pass != pr.Pass {
		p.endBar()
		p.pass = pr.Pass
		p.bar = p.bars.New(pr.PassPages, mpb.BarStyle(), mpb.BarRemoveOnComplete(),
			mpb.PrependDecorators(decor.Name(fmt.Sprintf("pass %d ", pr.Pass))),
			mpb.AppendDecorators(decor.Any(p.remaining)))
	}
	p.bar.SetCurrent(min(pr.CopiedPages, pr.PassPages-1))
}

// remaining words the rate and what is left at it.
func (p *progress) remaining(decor.Statistics) string {
	pr := p.latest.Load()
	if pr == nil || pr.Rate <= 0 {
		return ""
	}
	left := float64((pr.PassPages-pr.CopiedPages)*migrate.PageSize) / pr.Rate
	return fmt.Sprintf(" %s/s, %s left", size(int64(pr.Rate)), brief(time.Duration(left*float64(time.Second))))
}

func (p *progress) endBar() {
	if p.bar != nil {
		p.bar.Abort(true)
		p.bar.Wait()
		p.bar = nil
	}
}

// line prints above the bar.
func (p *progress) line(format string, args ...any) {
	text := fmt.Sprintf(format+"\n", args...)
	if p.bars != nil {
		// It fails only once the bars have been shut down.
		_, _ = p.bars.Write([]byte(text))
		return
	}
	fmt.Fprint(p.o.out, text)
}

// end takes the bar off the screen.
func (p *progress) end() {
	p.endBar()
	if p.bars != nil {
		p.bars.Wait()
	}
}

func passLine(p *lmctlv1.Pass) string {
	d := p.Duration.AsDuration()
	rate := ""
	if d > 0 {
		rate = fmt.Sprintf(" (%s/s)", size(int64(float64(p.Bytes)/d.Seconds())))
	}
	return fmt.Sprintf("pass %d  %8d pages, %d of them zero  %9s in %8s%s  %d written meanwhile",
		p.N, p.Pages, p.ZeroPages, size(p.Bytes), brief(d), rate, p.DirtyAfter)
}

// printReport prints the account of a completed migration.
func (o *options) printReport(r *migrate.Report) error {
	p := r.DowntimeParts
	verified := ""
	if r.VerifiedPages > 0 {
		verified = fmt.Sprintf("all %d pages are the same at both ends (took %s of the downtime)", r.VerifiedPages, brief(p.Verify))
	}
	parts := fmt.Sprintf("stop %s, last scan %s, last copy %s (%d pages), state save %s and load %s (%s), commit %s, resume %s",
		brief(p.Stop), brief(p.FinalScan), brief(p.FinalCopy), p.FinalPages, brief(p.StateSave), brief(p.StateLoad), size(p.StateBytes), brief(p.Commit), brief(p.Resume))
	if _, err := fmt.Fprintf(o.out, "%s moved from %s to %s\n", r.Guest, r.Source, r.Destination); err != nil {
		return err
	}
	return printFields(o.out,
		"  downtime", brief(r.Downtime), "  of it", parts, "  total", brief(r.Total),
		"  passes", fmt.Sprintf("%d, then %s", len(r.Passes), r.SwitchoverReason),
		"  sent", fmt.Sprintf("%s for %s of memory", size(r.BytesSent), size(r.RAMBytes)),
		"  verified", verified, "  announced", fmt.Sprintf("%d addresses", r.Announced), "  but", r.Error)
}
