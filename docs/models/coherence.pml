/* Two appliances that serve hosts from one primary: who may write, who may read without asking,
   who copies, what each knows of the other.  One extent (requests are cut at extents, so no
   request ever waits for two).

   Nodes 0 and 1; m is the other one of n.  What the names stand for:
     own     the node may write here: the extent is in its own record R
     oth     the other node may write here: it is in P, what this node holds of the other's record
     owed, odirt   given away, not yet acknowledged; some of it was not copied when it was given
     stored  it is in the node's stored record
     want, pwant   an ADD is under way: for a host's write; for a guess
     wait    a host's write waits;  wrote  one is on its way to the primary
     asked   the other wants it: new writes wait, those on their way land, then it is given
     dirty, cping, tmp   to be copied; a write to the secondary is under way, and its content
     emb     the other still has a write to the secondary under way here: do not copy yet
     rwait, rd, floor    a read waits for STATUS; is on its way; what it has to show at least
     known   the node has a complete P: it has exchanged records since it started, or is alone
     up      0 no link, 1 link and HELLO, RECORD sent, 3 the other's RECORD added to what is known
             and READY sent, 2 READY received: rights may change
     alone   the other is proven dead; all is ours
     gw, gc  what a dead process had under way and may still land, on primary and secondary
     ceased  the other takes over as planned: hosts off, everything given, then TAKEN

   A copy goes on when its extent is given away (`cping` stays), and the extent may come back before it
   has ended: the node then waits for its own old copy, the other one for FREE.

   Checked in every state:
     1. one node at most may write;            2. what one may write, the other knows of;
     3. where both sides may differ, every live node that knows has it in its stored record, and if
        there is none, one of the stored records has it;
     4. two nodes never write to a medium at once;
     5. a read shows what was answered before it began, and never less than a read that ended before it
        began (a register is linearizable);
   and where nothing goes on any more:
     6. nobody waits, both nodes are paired, nothing is dirty, both sides are equal.

   -DGO_ON: node 0 takes new places in a cut without proof (on_cut = go-on); node 1's record is then not
   complete: it compares everything when it takes over, and takes node 0's stored record in when that is
   back.
   -DCACHE: each node keeps answered writes in a cache of its own until it is told to harden them:
   the reason why a read asks.  -DBUG_... is a mistake that must give a counterexample;
   -DWITNESS_... a good end that must be reached. */

#ifndef WRITES
#define WRITES 2          /* by the hosts of node 0 */
#endif
#ifndef WRITES1
#define WRITES1 1         /* of node 1 */
#endif
#ifndef READS
#define READS 1           /* of each node */
#endif
#ifndef GUESSES
#define GUESSES 1         /* of node 1 */
#endif
#ifndef CUTS
#define CUTS 1
#endif
#ifndef STOPS
#define STOPS 0           /* orderly stops of one node */
#endif
#ifndef HANDS
#define HANDS 0           /* extents given unasked, for the other to copy */
#endif
#ifndef TAKES
#define TAKES 0           /* planned takeovers; 1 at most: of two that cross both are refused */
#endif
#ifndef CRASHES
#define CRASHES 0         /* deaths of a process, fenced ones included */
#endif
#ifndef CANCELS
#define CANCELS 1         /* hosts that go away while they wait */
#endif
#define CAP 8

mtype = { ADD, GUESS, GRANT, REFUSE, REMOVE, ASK, STATUS, FREE, GOT, RECORD, READY, BYE, TAKE, TAKEN };
chan q[2] = [CAP] of { mtype, bit, bit, bit, bit };

bit own[2], oth[2], owed[2], odirt[2], stored[2];
bit want[2], pwant[2], wait[2], wrote[2], asked[2];
bit dirty[2], cping[2], emb[2];
byte tmp[2];
bit rwait[2], rsent[2], rd[2], askd[2];
byte floor[2], writes[2], reads[2], guesses[2];
bit known[2], alive[2], alone[2], hk[2], gw[2], gc[2];
bit stopping[2]; byte stops, hands;
#if TAKES
byte ceased[2], takes; bit taken;            /* 1 giving, 2 TAKEN sent */
#define CEASED(n) ceased[n]
#else
#define CEASED(n) 0
#endif
bit vain[2];                                 /* given for a write, and not used yet */
bit sl[2];                                   /* `stored` as it was sent in RECORD */
byte up[2];
bit conn;
byte cancels, prim, sec, ver, acked, seen, cuts, crashes;
#ifdef CACHE
bit cv[2]; byte cver[2];
#define HARDEN(n)  if :: cv[n] -> prim = cver[n]; cv[n] = 0 :: else fi
#define VIEW(n)    (cv[n] -> cver[n] : prim)
#else
#define HARDEN(n)  skip
#define VIEW(n)    prim
#endif
bit gone;                                    /* node 0 has gone on; stands in its superblock */
bit adopted, crossed, returned;              /* for the witnesses */
#ifdef BUG_OWN_COPY_FORGOTTEN
bit stray[2]; byte strayed[2];               /* a copy that its own node does not know any more */
#define COPYING(n) (cping[n] || stray[n])
#else
#define COPYING(n) cping[n]
#endif
#ifdef BUG_EMBARGO_PASSED_ON
bit passed[2];                               /* the embargo goes back with the extent */
#endif
#ifdef WITNESS_ROUND_TRIP
bit lent[2], trip;                           /* given away with a copy under way, and back before its end */
#endif

/* What is sent over a connection that is gone is lost. */
#define SEND(m, t, a, b, c, d) \
  if :: conn -> assert(nfull(q[m])); q[m]!t(a, b, c, d) :: else fi

#ifdef GO_ON
#ifndef BUG_TRUSTS_AFTER_CUT
#define TRUST(n) (n == 0)        /* node 1 cannot know whether node 0 has gone on */
#else
#define TRUST(n) 1
#endif
#else
#define TRUST(n) 1
#endif
#ifdef BUG_FRESH_RECORD_UNSEEN
#define TAKES_L 0
#else
#define TAKES_L 1                /* what a fresh node's stored record names goes to the other, too */
#endif
#ifdef BUG_ALONE_DURING_EXCHANGE
#define ALONE_WRITES(n) alone[n]
#else
#define ALONE_WRITES(n) (alone[n] && !up[n])
#endif
#define SETTLED(n) (up[n] == 0 || up[n] == 2)

#ifdef BUG_CLEAR_AT_ONCE
#define CLEAN(n) (!cping[n])
#else
#define CLEAN(n) (!dirty[n] && !cping[n] && !wrote[n] && !emb[n])
#endif

inline submit(n) {
  assert(stored[n]);
  wait[n] = 0; dirty[n] = 1; wrote[n] = 1; vain[n] = 0
}
/* n hands its right over; whoever waits for it gets what has not been copied by name. */
inline give(n, m) {
#ifndef BUG_GIVE_UNHARDENED
  HARDEN(n);
#endif
  assert(!vain[n]);                         /* what was asked for has been used: progress */
  asked[n] = 0; own[n] = 0;
#ifndef BUG_GIVER_FORGETS
  oth[n] = 1;
#endif
#ifdef BUG_DIRT_STAYS
  odirt[n] = 0;
#else
  odirt[n] = dirty[n] | cping[n];
#endif
#ifndef BUG_NOTHING_OWED
  owed[n] = 1;
#endif
#ifdef BUG_EMBARGO_PASSED_ON
  passed[n] = emb[n];
#endif
  dirty[n] = 0; emb[n] = 0;
#ifdef BUG_NO_EMBARGO
  SEND(m, GRANT, odirt[n], 0, 0, 0);
#elif defined(BUG_EMBARGO_PASSED_ON)
  SEND(m, GRANT, odirt[n], cping[n] || passed[n], 0, 0);
#else
  SEND(m, GRANT, odirt[n], COPYING(n), 0, 0);
#endif
#ifdef WITNESS_ROUND_TRIP
  lent[n] = cping[n];
#endif
#ifdef BUG_OWN_COPY_FORGOTTEN
  if
  :: cping[n] && !stray[n] -> stray[n] = 1; strayed[n] = tmp[n]; cping[n] = 0; tmp[n] = 0
  :: else
  fi;
#endif
#ifdef BUG_NOTHING_OWED
  odirt[n] = 0
#endif
}
/* Nobody owns it here: record it as the other's, then say so. */
inline grant(n, m) {
#ifdef BUG_ACK_BEFORE_RECORD
  SEND(m, GRANT, 0, 0, 0, 0);
#else
  oth[n] = 1; stored[n] = 1;
  SEND(m, GRANT, 0, 0, 0, 0)
#endif
}
/* The other can write no more, anywhere: what was or may have been its own is ours, and dirty. */
inline absorb(n, trust) {
  if
  :: !known[n] || !trust -> own[n] = 1; dirty[n] = 1; stored[n] = 1   /* all ones: nobody knows better */
  :: known[n] && trust && (oth[n] || owed[n]) ->
#ifdef BUG_ABSORB_CLEAN
     own[n] = 1
#else
     own[n] = 1; dirty[n] = 1
#endif
  :: else
  fi;
  oth[n] = 0; owed[n] = 0; odirt[n] = 0; emb[n] = 0; known[n] = 1
}
inline flush_link() {
  conn = 0;
  do :: q[0]?_,_,_,_,_ :: q[1]?_,_,_,_,_ :: empty(q[0]) && empty(q[1]) -> break od
}
inline forget_requests(n) {
  want[n] = 0; pwant[n] = 0; asked[n] = 0; askd[n] = 0; rsent[n] = 0; up[n] = 0; sl[n] = 0;
#if TAKES
  ceased[n] = 0;              /* a cut ends a planned takeover: what was given stays given */
#endif
  skip
}
inline die(n) {
  flush_link(); forget_requests(n);
  alive[n] = 0; known[n] = 0; alone[n] = 0;
  gw[n] = wrote[n]; gc[n] = cping[n];
  stopping[n] = 0;
  own[n] = 0; oth[n] = 0; owed[n] = 0; odirt[n] = 0; wait[n] = 0; wrote[n] = 0;
  dirty[n] = 0; cping[n] = 0; emb[n] = 0; rwait[n] = 0; rd[n] = 0; vain[n] = 0; floor[n] = 0;
  crashes++
}
/* The process ends by itself; what it has sent still arrives. */
inline bye(n) {
  forget_requests(n);
  gc[n] = cping[n]; cping[n] = 0;
  stopping[n] = 0; alive[n] = 0; known[n] = 0; alone[n] = 0; own[n] = 0; oth[n] = 0; owed[n] = 0; odirt[n] = 0;
  dirty[n] = 0; emb[n] = 0; vain[n] = 0
}
/* What a dead process had sent lands or does not; afterwards nothing of it can. */
inline lay_ghosts(n) {
  if :: gw[n] -> ver++; prim = ver :: true fi;
  if :: gc[n] -> sec = tmp[n] :: true fi;
  gw[n] = 0; gc[n] = 0; if :: !cping[n] -> tmp[n] = 0 :: else fi
}

proctype Node(bit n) {
  bit m, a, b, c, d, mine;
  m = 1 - n;
  do
  /* -- hosts ---------------------------------------------------------------------------- */
  :: atomic { alive[n] && writes[n] && !wait[n] && !wrote[n] && !stopping[n] && !CEASED(n) && (known[n] || up[n]) ->
       writes[n]--; wait[n] = 1 }
  :: atomic { wait[n] && own[n] && !wrote[n] && !asked[n] -> submit(n) }
  :: atomic { wait[n] && !own[n] && ALONE_WRITES(n) -> own[n] = 1; stored[n] = 1; submit(n) }
  :: atomic { wait[n] && !own[n] && !want[n] && !pwant[n] && up[n] == 2 ->
       want[n] = 1; stored[n] = 1; SEND(m, ADD, 0, 0, 0, 0) }
  :: atomic { wait[n] && want[n] && cancels < CANCELS -> cancels++; wait[n] = 0 }
#ifdef GO_ON
  :: atomic { wait[n] && n == 0 && !own[n] && !oth[n] && !up[n] && known[n] && !alone[n] && !conn ->
       gone = 1; own[n] = 1; stored[n] = 1; submit(n) }
#endif
#ifdef BUG_CUT_WRITES_ON
  :: atomic { wait[n] && !own[n] && !oth[n] && !up[n] && known[n] && !conn ->
       own[n] = 1; stored[n] = 1; submit(n) }
#endif
  :: atomic { alive[n] && guesses[n] && !own[n] && !oth[n] && !want[n] && !pwant[n] && up[n] == 2 ->
       guesses[n]--; pwant[n] = 1; stored[n] = 1; SEND(m, GUESS, 0, 0, 0, 0) }
  :: atomic { wrote[n] ->                                         /* it lands and is answered */
       wrote[n] = 0; ver++; acked = ver;
#ifdef CACHE
       cv[n] = 1; cver[n] = ver
#else
       prim = ver
#endif
     }
#ifdef CACHE
  :: atomic { cv[n] -> HARDEN(n) }
#endif
  :: atomic { alive[n] && reads[n] && !rwait[n] && !rd[n] && !stopping[n] && !CEASED(n) && (known[n] || up[n]) ->
       reads[n]--; rwait[n] = 1; floor[n] = (acked > seen -> acked : seen) }
#ifdef BUG_READ_WITHOUT_ASKING
  :: atomic { rwait[n] -> rwait[n] = 0; rd[n] = 1 }
#else
  :: atomic { rwait[n] && known[n] && !oth[n] && SETTLED(n) -> rwait[n] = 0; rsent[n] = 0; rd[n] = 1 }
  :: atomic { rwait[n] && oth[n] && !rsent[n] && up[n] == 2 -> rsent[n] = 1; SEND(m, ASK, 0, 0, 0, 0) }
#endif
  :: atomic { rd[n] -> rd[n] = 0;
       assert(VIEW(n) >= floor[n]);
       if :: VIEW(n) > seen -> seen = VIEW(n) :: else fi; floor[n] = 0 }

  /* -- giving, and answering reads ------------------------------------------------------ */
#ifdef BUG_GIVE_IN_FLIGHT
  :: atomic { asked[n] && own[n] && up[n] == 2 -> give(n, m) }
#else
  :: atomic { asked[n] && own[n] && !wrote[n] && up[n] == 2 -> give(n, m) }
#endif
  :: atomic { askd[n] && !wrote[n] && up[n] == 2 ->
#ifndef BUG_STATUS_UNHARDENED
       HARDEN(n);
#endif
       askd[n] = 0; SEND(m, STATUS, 0, 0, 0, 0) }

  :: atomic { hands < HANDS && own[n] && dirty[n] && !wrote[n] && !wait[n] && !want[n] && !asked[n] && up[n] == 2 ->
       hands++; give(n, m) }
#if TAKES
  /* A planned takeover: the other's hosts off, all of it given, then TAKEN. */
  :: atomic { alive[n] && takes < TAKES && up[n] == 2 && !stopping[n] && !CEASED(n) ->
       takes++; SEND(m, TAKE, 0, 0, 0, 0) }
  :: atomic { alive[n] && up[n] == 2 && q[n]?[TAKE] -> q[n]?TAKE(_, _, _, _);
       if :: !stopping[n] -> ceased[n] = 1; wait[n] = 0; rwait[n] = 0; vain[n] = 0; floor[n] = 0 :: else fi }
  :: atomic { ceased[n] && own[n] && !wrote[n] && !want[n] && up[n] == 2 -> give(n, m) }
#ifdef BUG_TAKEN_BEFORE_GIVEN
  :: atomic { ceased[n] == 1 && !wrote[n] && up[n] == 2 ->
#else
  :: atomic { ceased[n] == 1 && !own[n] && !wrote[n] && !rd[n] && !want[n] && !pwant[n] && up[n] == 2 ->
#endif
       ceased[n] = 2; SEND(m, TAKEN, 0, 0, 0, 0) }
  :: atomic { alive[n] && up[n] == 2 && q[n]?[TAKEN] -> q[n]?TAKEN(_, _, _, _);
       assert(!own[m] && !wrote[m] && !wait[m]);           /* nobody writes there any more */
       taken = 1 }
#endif
  /* An orderly stop: hosts off, everything given, nothing under way anywhere, BYE. */
  :: atomic { stopping[n] && own[n] && !wrote[n] && !want[n] && up[n] == 2 -> give(n, m) }
#ifdef BUG_BYE_BEFORE_COPIES_END
  :: atomic { stopping[n] && !own[n] && !wrote[n] && !want[n] && !pwant[n] && up[n] == 2 ->
#else
  :: atomic { stopping[n] && !own[n] && !wrote[n] && !cping[n] && !owed[n] && !want[n] && !pwant[n] && up[n] == 2 ->
#endif
       SEND(m, BYE, 0, 0, 0, 0); bye(n) }
  :: atomic { stopping[n] && !up[n] && !wrote[n] && !cping[n] -> bye(n) }      /* nobody there */

  /* -- copying, and what leaves the record ---------------------------------------------- */
#ifdef BUG_COPY_UNDER_EMBARGO
  :: atomic { own[n] && dirty[n] && !wrote[n] && !cping[n] ->
#else
  :: atomic { own[n] && dirty[n] && !wrote[n] && !cping[n] && !emb[n] ->
#endif
       tmp[n] = VIEW(n); dirty[n] = 0; cping[n] = 1 }
  :: atomic { cping[n] && alive[n] ->
       sec = tmp[n]; cping[n] = 0; tmp[n] = 0;
#ifdef WITNESS_ROUND_TRIP
       trip = trip || (lent[n] && own[n]); lent[n] = 0;
#endif
       if :: !own[n] && up[n] -> SEND(m, FREE, 0, 0, 0, 0) :: else fi }
#ifdef BUG_OWN_COPY_FORGOTTEN
  :: atomic { stray[n] && alive[n] ->
       sec = strayed[n]; stray[n] = 0; strayed[n] = 0;
       if :: !own[n] && up[n] -> SEND(m, FREE, 0, 0, 0, 0) :: else fi }
#endif
  :: atomic { own[n] && CLEAN(n) && !wait[n] && !asked[n] && SETTLED(n) ->
       own[n] = 0;
#ifdef CACHE
       HARDEN(n);
#endif
       if :: stored[n] = 0 :: true fi;                            /* clears are lazy */
       if :: up[n] == 2 -> SEND(m, REMOVE, 0, 0, 0, 0) :: else fi }

  /* -- messages -------------------------------------------------------------------------- */
  :: atomic { alive[n] && up[n] == 2 && q[n]?[ADD] -> q[n]?ADD(_, _, _, _);
       if
       :: own[n] -> asked[n] = 1
#ifndef BUG_GRANT_TWICE
       :: owed[n] -> skip                    /* given unasked: that GRANT, on its way, is the answer */
#define GIVEN(n) owed[n]
#else
#define GIVEN(n) 0
#endif
#ifndef BUG_BOTH_GRANT
       :: !own[n] && !GIVEN(n) && want[n] && n == 0 -> asked[n] = 1; crossed = 1   /* 0 goes first */
       :: !own[n] && !GIVEN(n) && !(want[n] && n == 0) -> grant(n, m)
#else
       :: !own[n] && !GIVEN(n) -> grant(n, m)
#endif
       fi }
  :: atomic { alive[n] && up[n] == 2 && q[n]?[GUESS] -> q[n]?GUESS(_, _, _, _);
       if
       :: GIVEN(n) -> skip
#ifndef BUG_GUESS_TAKES
       :: !GIVEN(n) && (own[n] || want[n] || pwant[n]) -> SEND(m, REFUSE, 0, 0, 0, 0)
       :: else -> grant(n, m)
#else
       :: true -> grant(n, m)
#endif
       fi }
  :: atomic { alive[n] && up[n] == 2 && q[n]?[GRANT] -> q[n]?GRANT(a, b, _, _);
       c = oth[n] || owed[n]; vain[n] = want[n] && wait[n]; own[n] = 1; oth[n] = 0; want[n] = 0; pwant[n] = 0; emb[n] = b;
       if :: a -> dirty[n] = 1 :: else fi;
#ifndef BUG_NO_GOT
       if :: c -> SEND(m, GOT, 0, 0, 0, 0) :: else fi;             /* else the giver had nothing to give */
#endif
#ifdef BUG_GRANTED_IS_GIVEN_FIRST
       skip;
#else
       if :: wait[n] && !wrote[n] -> submit(n) :: else fi;         /* whoever waited goes first */
#endif
       a = 0; b = 0; c = 0 }
  :: atomic { alive[n] && up[n] == 2 && q[n]?[REFUSE] -> q[n]?REFUSE(_, _, _, _); pwant[n] = 0 }
  :: atomic { alive[n] && up[n] == 2 && q[n]?[GOT] -> q[n]?GOT(_, _, _, _); owed[n] = 0; odirt[n] = 0 }
  :: atomic { alive[n] && up[n] == 2 && q[n]?[REMOVE] -> q[n]?REMOVE(_, _, _, _);
       oth[n] = 0;
       if :: !own[n] && !want[n] && !pwant[n] -> stored[n] = 0 :: true fi }
  :: atomic { alive[n] && up[n] == 2 && q[n]?[ASK] -> q[n]?ASK(_, _, _, _); askd[n] = 1 }
  :: atomic { alive[n] && up[n] == 2 && q[n]?[STATUS] -> q[n]?STATUS(_, _, _, _);
       if :: rwait[n] && rsent[n] -> rwait[n] = 0; rd[n] = 1 :: else fi; rsent[n] = 0 }
#ifndef BUG_FREE_MEANS_NOW
  :: atomic { alive[n] && up[n] >= 2 && q[n]?[FREE] -> q[n]?FREE(_, _, _, _); emb[n] = 0; d = 0 }
#else
  :: atomic { alive[n] && up[n] >= 2 && q[n]?[FREE] -> q[n]?FREE(_, _, _, _); emb[n] = 0 }
#endif

  :: atomic { alive[n] && up[n] == 2 && q[n]?[BYE] -> q[n]?BYE(_, _, _, _);
       forget_requests(n); flush_link(); alone[n] = 1; oth[n] = 0; emb[n] = 0;
       if :: owed[n] -> own[n] = 1; dirty[n] = 1 :: else fi; owed[n] = 0; odirt[n] = 0 }

  /* -- the link --------------------------------------------------------------------------- */
  :: atomic { alive[n] && up[n] && !conn ->
       forget_requests(n); a = 0; b = 0; c = 0; d = 0 }
  :: atomic { alive[n] && up[n] == 1 && q[n]?[RECORD] -> q[n]?RECORD(a, b, c, d);
       /* a, b: the other's own and owed;  c: its stored record;  d: it still writes to the
          secondary, here, without owning it.  First what is known grows, on both sides; rights
          change only when the other has said that it knows. */
       assert(!(own[n] && a));
#ifndef BUG_OWED_IS_NOT_KNOWN
       if :: !own[n] && (a || b || (!hk[n] && c && (!known[n] || TAKES_L))
                     || (!known[n] && hk[n] && sl[n] && TAKES_L)) ->
            oth[n] = 1; stored[n] = 1
       :: else fi;
#else
       if :: !own[n] && (a || (!hk[n] && c && (!known[n] || TAKES_L))
                     || (!known[n] && hk[n] && sl[n] && TAKES_L)) ->
            oth[n] = 1; stored[n] = 1
       :: else fi;
#endif
#ifndef BUG_UNION_LOST_BY_A_CUT
       /* What the fresh one's record names will be ours; a second cut must not lose that. */
       if :: known[n] && !hk[n] && c && !own[n] && TAKES_L -> owed[n] = 1 :: else fi;
#endif
       SEND(m, READY, 0, 0, 0, 0);
       up[n] = 3; alone[n] = 0
#ifdef BUG_RECLAIM_BEFORE_READY
       ; goto rights
#endif
     }
  :: atomic { alive[n] && up[n] == 3 && q[n]?[READY] -> q[n]?READY(_, _, _, _);
rights:
       mine = 0;
       if
       :: known[n] && hk[n] ->                              /* both have lived since the last time */
          if
          :: own[n] -> mine = 1
          :: !own[n] && owed[n] && !a && !b -> mine = 1; returned = 1;   /* GRANT was lost */
             /* What went along may be out of date: it may have been there and back. */
#ifdef BUG_LOST_GRANT_CLEAN
             skip
#elif defined(BUG_OLD_DIRT)
             if :: odirt[n] -> dirty[n] = 1 :: else fi
#else
             dirty[n] = 1
#endif
          :: !own[n] && owed[n] && b && n == 0 -> mine = 1; dirty[n] = 1 /* went there and back */
          :: else
          fi;
          oth[n] = !mine && (a || b)
       :: known[n] && !hk[n] ->                             /* absorbed already; what it had gone on with */
          mine = own[n] || (TAKES_L && c); oth[n] = 0;
          if :: mine && !own[n] -> dirty[n] = 1 :: else fi
       :: !known[n] && hk[n] -> oth[n] = a || (TAKES_L && sl[n])
       :: !known[n] && !hk[n] ->                            /* both died: the union, shared out */
#ifdef BUG_UNION_IS_OWN_ONLY
          mine = sl[n] && n == 0;
#else
          mine = sl[n] && (!c || n == 0);
#endif
          oth[n] = c && !mine;
          if :: mine -> dirty[n] = 1; adopted = 1 :: else fi
       fi;
       own[n] = mine; owed[n] = 0; odirt[n] = 0;
#ifndef BUG_EMBARGO_FORGOTTEN
       emb[n] = d;
#else
       emb[n] = 0;
#endif
       known[n] = 1; up[n] = 2; if :: n == 0 -> gone = 0 :: else fi;
       a = 0; b = 0; c = 0; d = 0; mine = 0; sl[n] = 0 }

  /* -- taking over: fencing kills first.  Only a node that has lost the link does it. -------- */
  :: atomic { alive[n] && !up[n] && !conn && !alone[n] && crashes < CRASHES ->
#ifndef BUG_TIMEOUT_IS_PROOF
       if :: alive[m] -> die(m) :: else fi;
       lay_ghosts(m);
#else
       crashes++;
#endif
       absorb(n, TRUST(n)); alone[n] = 1 }
  od
}

proctype World() {
  bit i;
  do
  :: atomic { conn && cuts < CUTS -> cuts++; flush_link() }
  /* A connection, TLS and HELLO on both sides. */
  :: atomic { !conn && alive[0] && alive[1] && !up[0] && !up[1] && !(alone[0] && alone[1]) ->
       conn = 1; hk[0] = known[1]; hk[1] = known[0];
       /* A new process of the other says HELLO: the old one is dead. */
       if :: known[0] && !known[1] -> absorb(0, 1) :: else fi;
       if :: known[1] && !known[0] -> absorb(1, 1) :: else fi;
       up[0] = 1; up[1] = 1;
       sl[0] = stored[0]; sl[1] = stored[1];
       q[1]!RECORD(own[0], owed[0], stored[0], COPYING(0) && !own[0]);
       q[0]!RECORD(own[1], owed[1], stored[1], COPYING(1) && !own[1]) }
  :: atomic { stops < STOPS && alive[0] && up[0] == 2 && !stopping[1] ->
       stops++; stopping[0] = 1; wait[0] = 0; rwait[0] = 0; floor[0] = 0 }
  :: atomic { stops < STOPS && alive[1] && up[1] == 2 && !stopping[0] ->
       stops++; stopping[1] = 1; wait[1] = 0; rwait[1] = 0; floor[1] = 0 }
  :: atomic { conn && !alive[0] && empty(q[1]) -> conn = 0; flush_link() }
  :: atomic { conn && !alive[1] && empty(q[0]) -> conn = 0; flush_link() }
  :: atomic { crashes < CRASHES && alive[0] -> die(0) }
  :: atomic { crashes < CRASHES && alive[1] -> die(1) }
  :: atomic { gw[0] || gw[1] || gc[0] || gc[1] ->
       if :: gw[0] || gc[0] -> i = 0 :: gw[1] || gc[1] -> i = 1 fi;
       lay_ghosts(i); i = 0 }
#ifdef BUG_RESTART_BEFORE_GHOSTS
  :: atomic { !alive[0] -> alive[0] = 1 }
  :: atomic { !alive[1] -> alive[1] = 1 }
#else
  :: atomic { !alive[0] && !conn -> lay_ghosts(0); alive[0] = 1 }
  :: atomic { !alive[1] && !conn -> lay_ghosts(1); alive[1] = 1 }
#endif
  od
}

#define KNOWS(n) (alive[n] && known[n])
#ifdef CACHE
#define DIFFER (prim != sec || cv[0] || cv[1])
#else
#define DIFFER (prim != sec)
#endif
proctype Monitor() {
  atomic {
    (   (own[0] && own[1])
     || (own[0] && KNOWS(1) && !oth[1] && !owed[1] && (!gone || alone[1]))
     || (own[1] && KNOWS(0) && !oth[0] && !owed[0])
     || (DIFFER && KNOWS(0) && !stored[0]) || (DIFFER && KNOWS(1) && !stored[1] && (!gone || alone[1]))
     || (DIFFER && !KNOWS(0) && !KNOWS(1) && !stored[0] && !stored[1])
     || ((wrote[0] || gw[0]) && (wrote[1] || gw[1]))
     || ((cping[0] || gc[0]) && (cping[1] || gc[1]))
#ifdef WITNESS_ROUND_TRIP
     || (trip && up[0] == 2 && up[1] == 2 && prim == sec && ver && !own[0] && !own[1])
#endif
#if TAKES && defined(WITNESS_TAKEN)
     || (taken && up[0] == 2 && up[1] == 2 && prim == sec && ver && !own[0] && !own[1])
#endif
#ifdef WITNESS_CROSSED
     || (crossed && !writes[0] && !writes[1] && !wait[0] && !wait[1] && ver == WRITES + WRITES1
         && prim == sec && !stored[0] && !stored[1])
#endif
#ifdef WITNESS_RETURNED
     || (returned && up[0] == 2 && up[1] == 2 && prim == sec && ver && !own[0] && !own[1])
#endif
#ifdef WITNESS_UNION
     || (adopted && up[0] == 2 && up[1] == 2 && prim == sec && ver && !own[0] && !own[1])
#endif
    ) -> assert(false)
  }
}
proctype Rest() {                      /* nothing can be done any more, by anybody */
  timeout ->
  assert(alive[0] && alive[1] && up[0] == 2 && up[1] == 2);
  assert(!wait[0] && !wait[1] && !rwait[0] && !rwait[1] && (!writes[0] || CEASED(0)) && (!writes[1] || CEASED(1)));
  assert(!dirty[0] && !dirty[1] && prim == sec && !DIFFER)
}
init {
  atomic {
    alive[0] = 1; alive[1] = 1; known[0] = 1; known[1] = 1; conn = 1; up[0] = 2; up[1] = 2;
    writes[0] = WRITES; writes[1] = WRITES1; reads[0] = READS; reads[1] = READS;
    guesses[1] = GUESSES;
    run Node(0); run Node(1); run World(); run Monitor(); run Rest()
  }
}
