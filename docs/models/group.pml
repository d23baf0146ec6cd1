/* A group of two volumes, A and B, that are cut at one instant, in two rounds.

   CUT: a member switches eras, and from then on withholds the answers to writes of its new era, not
   the writes.  RELEASE, when all have cut: it sends them.  A member that does not answer makes the
   cut be given up (VOID), which releases everybody.  The coordinator may hang at any moment: a member
   that hears no RELEASE for a while gives its own cut up, and then its answers.  Two hosts write dependent numbers, one to A and
   then to B, one to B and then to A.  A point holds all that was submitted before its volume's cut.

   Checked: when both have heard RELEASE for their cuts, no point has a write of which it lacks what was answered before it.
   Each BUG_ is a mistake that gives a counterexample, WITNESS_CUT a good end that is reached. */

#ifndef WRITES
#define WRITES 3
#endif

byte a, b;                  /* of host 1: on A, then on B */
byte c, d;                  /* of host 2: d on B, then c on A */
byte pa, pb, pc, pd;        /* the same in the points */
bool cut_a, cut_b, released_a, released_b, voided;
bool told_a, told_b;         /* of RELEASE, before it had given its cut up */

#ifdef BUG_NOT_WITHHELD
#define ANSWERED_A(new) true
#define ANSWERED_B(new) true
#else
#define ANSWERED_A(new) (!new || released_a)
#define ANSWERED_B(new) (!new || released_b)
#endif

active proctype Host1() {
  byte i = 1;
  bool new;
  do
  :: i <= WRITES ->
     atomic { a = i; new = cut_a };
     ANSWERED_A(new);
     atomic { b = i; new = cut_b };
     ANSWERED_B(new);
     i++
  :: else -> break
  od
}

active proctype Host2() {
  byte i = 1;
  bool new;
  do
  :: i <= WRITES ->
     atomic { d = i; new = cut_b };
     ANSWERED_B(new);
     atomic { c = i; new = cut_a };
     ANSWERED_A(new);
     i++
  :: else -> break
  od
}

active proctype MemberA() { atomic { cut_a = 1; pa = a; pc = c } }

active proctype MemberB() {
  if
  :: atomic { cut_b = 1; pb = b; pd = d }
  :: voided = 1                                    /* it does not answer in time */
  fi
}

inline release(released, told) {
  atomic {
    if
#ifndef BUG_TIMER_KEEPS_THE_CUT
    :: !released -> told = 1
#else
    :: told = 1
#endif
    :: else -> skip
    fi;
    released = 1
  }
}

active proctype TimerA() { cut_a; released_a = 1 }      /* or too late to matter */

active proctype TimerB() { cut_b; released_b = 1 }

active proctype Coordinator() {
#ifndef BUG_RELEASED_EARLY
  (cut_a && (cut_b || voided));
#else
  cut_a;
#endif
  if
  :: release(released_a, told_a)
  :: goto hangs
  fi;
  if
  :: release(released_b, told_b)
  :: goto hangs
  fi;
hangs: skip
}

active proctype Check() {
  atomic {
    cut_a && cut_b && told_a && told_b ->
#ifdef WITNESS_CUT
    assert(pb == 0 || pd == 0);
#endif
    assert(pb <= pa && pa <= pb + 1);
    assert(pc <= pd && pd <= pc + 1)
  }
}
