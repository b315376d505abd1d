package retry_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/internal/retry"
)

var errBroken = errors.New("connection reset")

func seconds(n int) time.Duration { return time.Duration(n) * time.Second }

func Example() {
	policy := retry.Policy{
		Retries: 3,
		Backoff: func(n int) time.Duration { return time.Duration(n) * time.Millisecond },
		OnRetry: func(err error, wait time.Duration) { fmt.Printf("%v; trying again in %v\n", err, wait) },
	}
	ctx, calls := context.Background(), 0
	read := func() error { // fails twice
		if calls++; calls < 3 {
			return errors.New("connection reset")
		}
		return nil
	}
	progress := retry.NewProgress()
	attempts := policy.Start(progress)
	for {
		err := read()
		if err == nil {
			progress.Mark()
			fmt.Println("done")
			return
		}
		wait, gaveUp := attempts.Failed(err)
		if gaveUp != nil {
			fmt.Println(gaveUp)
			return
		}
		if !policy.Pause(ctx, err, wait, nil) {
			fmt.Println(context.Cause(ctx))
			return
		}
	}
	// Output:
	// connection reset; trying again in 1ms
	// connection reset; trying again in 2ms
	// done
}

func TestGiveUp(t *testing.T) {
	special := errors.New("the login was refused")
	for _, test := range []struct {
		name     string
		policy   retry.Policy
		err      error
		failures int
		idle     time.Duration
		want     string // "": try again
	}{
		{name: "no retries", err: errBroken, failures: 1, want: "connection reset"},
		{name: "retries are left", policy: retry.Policy{Retries: 2}, err: errBroken, failures: 2},
		{name: "no retries are left", policy: retry.Policy{Retries: 2}, err: errBroken, failures: 3, want: "gave up after 2 retries: connection reset"},
		{name: "without limit", policy: retry.Policy{Retries: -1}, err: errBroken, failures: 1 << 30, idle: 14 * time.Minute},
		{name: "default timeout", policy: retry.Policy{Retries: -1}, err: errBroken, failures: 1, idle: 15 * time.Minute, want: "gave up after 15m0s without progress: connection reset"},
		{name: "timeout", policy: retry.Policy{Retries: -1, Timeout: time.Minute}, err: errBroken, failures: 1, idle: 61 * time.Second, want: "gave up after 1m1s without progress: connection reset"},
		{name: "too little time for an attempt", policy: retry.Policy{Retries: -1, Timeout: time.Minute}, err: errBroken, failures: 1, idle: time.Minute - 200*time.Millisecond, want: "gave up after 1m0s without progress: connection reset"},
		{name: "marked", policy: retry.Policy{Retries: -1}, err: fmt.Errorf("read: %w", retry.Permanent(errBroken)), failures: 1, want: "read: connection reset"},
		{name: "no file", policy: retry.Policy{Retries: -1}, err: fs.ErrNotExist, failures: 1, want: "file does not exist"},
		{name: "permanent by the policy", policy: retry.Policy{Retries: -1, Permanent: func(err error) bool { return err == special }}, err: special, failures: 1, want: special.Error()},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := test.policy.GiveUp(test.err, test.failures, test.idle)
			switch {
			case test.want == "" && got != nil, test.want != "" && (got == nil || got.Error() != test.want):
				t.Errorf("got %v, want %q", got, test.want)
			case got != nil && !errors.Is(got, test.err):
				t.Errorf("%v does not wrap %v", got, test.err)
			}
		})
	}
}

func TestDelay(t *testing.T) {
	var p retry.Policy
	for n, most := range []time.Duration{1, 2, 4, 8, 16, 32, 60, 60, 60} {
		most *= time.Second
		if d := p.Delay(n + 1); d > most || d < most/2 {
			t.Errorf("delay %d is %v, want from %v to %v", n+1, d, most/2, most)
		}
	}
	if d := p.Delay(1 << 40); d > time.Minute || d < time.Minute/2 {
		t.Errorf("a late delay is %v", d)
	}
}

func TestWait(t *testing.T) {
	p := retry.Policy{Timeout: 10 * time.Second, Backoff: seconds}
	for _, test := range []struct {
		n    int
		idle time.Duration
		want time.Duration
		ok   bool
	}{
		{1, 0, time.Second, true},
		{5, 6 * time.Second, 3 * time.Second, true}, // an attempt gets a quarter of what is left
		{1, 9800 * time.Millisecond, 0, false},
		{1, time.Hour, 0, false},
	} {
		if got, ok := p.Wait(test.n, test.idle); got != test.want || ok != test.ok {
			t.Errorf("retry %d after %v: %v, %v, want %v, %v", test.n, test.idle, got, ok, test.want, test.ok)
		}
	}
}

// A success of another operation with the same Progress extends the patience, and
// so does a success of a part of the operation itself.
func TestAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := retry.Policy{Retries: 3, Timeout: time.Minute, Backoff: seconds}
		progress := retry.NewProgress()
		time.Sleep(time.Hour)
		a := p.Start(progress)
		time.Sleep(50 * time.Second)
		if a.Idle() != 50*time.Second || a.Left() != 10*time.Second {
			t.Errorf("idle %v, left %v", a.Idle(), a.Left())
		}
		progress.Mark()
		time.Sleep(50 * time.Second)
		if wait, err := a.Failed(errBroken); err != nil || wait != time.Second || a.Failures() != 1 {
			t.Errorf("first failure: %v, %v", wait, err)
		}
		a.Advance()
		if a.Idle() != 0 || a.Failures() != 0 {
			t.Errorf("idle %v after %d failures", a.Idle(), a.Failures())
		}
		for n := 1; n <= 3; n++ {
			if wait, err := a.Failed(errBroken); err != nil || wait != seconds(n) {
				t.Errorf("failure %d: %v, %v", n, wait, err)
			}
		}
		if _, err := a.Failed(errBroken); err == nil || err.Error() != "gave up after 3 retries: connection reset" {
			t.Errorf("last failure: %v", err)
		}
		time.Sleep(2 * time.Minute)
		if a.Left() != 0 {
			t.Errorf("left %v", a.Left())
		}
	})
}

func TestPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told []time.Duration
		p := retry.Policy{OnRetry: func(err error, wait time.Duration) {
			if err != errBroken {
				t.Errorf("OnRetry got %v", err)
			}
			told = append(told, wait)
		}}
		ctx, cancel := context.WithCancel(t.Context())
		stop := make(chan struct{})
		start := time.Now()
		if !p.Pause(ctx, errBroken, time.Hour, stop) || time.Since(start) != time.Hour {
			t.Errorf("paused %v", time.Since(start))
		}
		time.AfterFunc(time.Second, func() { close(stop) })
		if p.Pause(ctx, errBroken, time.Hour, stop) || p.Pause(ctx, errBroken, 0, stop) {
			t.Error("a closed channel did not stop the pause")
		}
		time.AfterFunc(time.Second, cancel)
		if p.Pause(ctx, errBroken, time.Hour, nil) || p.Pause(ctx, errBroken, 0, nil) {
			t.Error("the end of the context did not stop the pause")
		}
		if len(told) != 5 {
			t.Errorf("OnRetry was called %d times", len(told))
		}
		if retry.Sleep(t.Context(), 0, nil) != true {
			t.Error("a sleep of 0 failed")
		}
	})
}
